"""Operations that more than one package stands on, each with a reference that can be read and a kernel that is fast."""
