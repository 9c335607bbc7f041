"""What runs and sweeps come to, and what was published, modelled and measured: read, checked, as tables and pages. Loads no torch."""
