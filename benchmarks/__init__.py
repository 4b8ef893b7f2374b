"""What moiety claims, measured against peers in the same run."""
