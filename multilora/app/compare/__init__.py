"""The command that says which method is worth its cost: plan, runs, statistics and report."""
