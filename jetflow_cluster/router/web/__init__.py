"""HTTP beside gRPC: the routes of the OpenAI API, by the same servicer in the same event loop."""
