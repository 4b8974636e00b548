"""No test reaches for the network: the hub's clients read this when they are imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
