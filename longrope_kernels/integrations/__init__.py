"""apply_rotary inside other people's model code. Each module imports its library, this one none."""
