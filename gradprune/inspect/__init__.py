"""What a compilation did, for people to read and for programs to check."""
