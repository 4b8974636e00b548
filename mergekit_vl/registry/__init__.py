"""The registry of plugins, built-ins included: hooks, loading, checks of registered classes, and safe calls of foreign code."""
