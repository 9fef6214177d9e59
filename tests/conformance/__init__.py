"""Other people's clients and suites against `mball serve` on a real model: `scripts/conformance` runs them."""
