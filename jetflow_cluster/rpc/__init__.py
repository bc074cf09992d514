"""The public gRPC API: messages, conversions, errors, and the client. Imports no torch."""
