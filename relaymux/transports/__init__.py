"""The built-in ways to reach a peer, and how they and others are found."""
