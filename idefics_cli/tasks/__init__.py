"""What a command does with a row: captions, answers, free prompts, embeddings."""
