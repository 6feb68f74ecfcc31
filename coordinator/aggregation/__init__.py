"""The table of aggregation rules, and each rule's requirements."""
