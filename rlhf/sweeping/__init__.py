"""Many jobs from one command: the sweep's file, who runs when and on which GPUs, processes that leave no orphan, SLURM, search.

Knows commands and folders; knows no configuration of a job, no Hydra, no torch.
"""
