"""What was published, modelled and measured, side by side: read, checked, written as a table and drawn. Loads no torch."""
