"""Question answering with a search tool: SearchQA, and FactbookQA without downloads."""
