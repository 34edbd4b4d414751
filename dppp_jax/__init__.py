"""Person re-identification without photographs of people."""
