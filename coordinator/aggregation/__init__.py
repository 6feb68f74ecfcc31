"""The table of server rules, and what each rule needs."""
