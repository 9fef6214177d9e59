"""Swap: NVMe as the lowest rung for weights, cold layers and KV blocks."""
