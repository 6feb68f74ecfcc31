"""The folder of a site: keys, settings, policy, approvals and audit log."""
