"""Changes of a step graph, one family per file; `manager` runs them in order."""
