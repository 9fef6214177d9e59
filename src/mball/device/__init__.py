"""Devices and their memory: what a process holds, what is free, and who may take more."""
