"""Training of the embedded target model and of draft heads."""
