"""Language models behind an API: completions with log-probabilities over HTTP."""
