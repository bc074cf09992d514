"""Shared by the tests: small models, slow oracles, adversarial drafters."""
