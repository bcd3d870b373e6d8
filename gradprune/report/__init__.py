"""What a compilation did, as data."""
