"""Operations of tree speculation over paged KV. Imports nothing heavy."""
