"""Models to try MBALL with: real small ones made from packages, and random ones of any size."""
