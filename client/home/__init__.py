"""What a site keeps: its folder, policy, approvals and audit log."""
