"""The search of a learning rate: `rate_search` is the search, by the short runs of `trials`; `finding` is its verb."""
