"""What the operating system gives: files written whole, regular files alone, locks, memory, signals."""
