//! The arithmetic that candle does not have, each function with its plain reference.
