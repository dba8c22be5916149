"""Which units go: scores and targets become a decision."""
