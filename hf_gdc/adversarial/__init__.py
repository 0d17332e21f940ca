"""What adversarial training of language models needs below its trainers: real text, discriminators, energies, token credit."""
