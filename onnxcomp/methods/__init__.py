"""What several passes share, method by method; passes are the pages that use it."""
