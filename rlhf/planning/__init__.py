"""What a run needs before anything is loaded: memory by part and phase, seconds by phase, dollars.

Knows sizes, formulas and the habits of this project's engines; imports no torch. docs/planning.md says what is exact and what is an estimate.
"""
