"""The engine: claims evaluations, runs them in slots, records what they return, and keeps the lease."""
