"""`rlhf VERB -m`: from words to cells to a table; processes, GPUs and clusters are rlhf/sweeping's."""
