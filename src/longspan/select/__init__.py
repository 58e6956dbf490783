"""Content decides: how important keys are, how many may stay, and which those are."""
