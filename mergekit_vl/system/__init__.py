"""Operating system services: atomic files, safe reading of files, locks, memory, signals, devices."""
