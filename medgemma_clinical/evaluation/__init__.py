"""Arrays in, figures and pages out; no models."""
