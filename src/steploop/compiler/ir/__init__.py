"""A step as a graph: what it is (`graph`), how it is changed (`edit`), printed (`show`) and checked (`check`)."""
