"""Swap-ins for other libraries' layers. Nothing here imports those libraries before they are needed."""
