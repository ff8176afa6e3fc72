"""What tests are made of, one of each: models, layers, data, comparisons. A test file keeps what only it needs."""
