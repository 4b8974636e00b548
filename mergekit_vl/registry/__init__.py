"""What plugins register, the built-in ones among them, and how they are found, checked and called."""
