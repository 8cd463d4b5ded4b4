"""What a request is: its prompt, its settings, its sequences as the host sees them, its outputs."""
