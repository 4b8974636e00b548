"""Datasets: one file per kind; base.py has the contract."""
