"""From preference files to token ids to packed rows."""
