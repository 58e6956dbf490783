"""Measure models at long contexts: perplexity, passkey retrieval, resumable records."""
