//! AlpacaEval's coin: which of two outputs its judge is shown first.
//!
//! Python's `random.Random(text).choices([False, True])[0]`: the Mersenne twister, seeded by the array of the 32-bit words
//! (least first) of the number that the text's UTF-8 bytes and their SHA-512 digest spell, most significant byte first.

use rand_mt::Mt;
use sha2::{Digest, Sha512};

/// Whether the judge sees the second output first; one coin per instruction (alpaca_eval 0.6.6, pairwise_evaluator.py).
pub fn is_switched(instruction: &str, seed: u64) -> bool {
    let text = format!("is_switched_outputs{instruction}{seed}");
    let mut rng = python_random(&text);
    // random() has 53 bits; its half is decided by the first 27 of them, the top 27 of the first draw.
    rng.next_u32() >> 31 == 1
}

fn python_random(text: &str) -> Mt {
    let mut bytes = text.as_bytes().to_vec();
    bytes.extend(Sha512::digest(text.as_bytes()));
    let words: Vec<u32> = bytes
        .rchunks(4)
        .map(|chunk| {
            chunk
                .iter()
                .fold(0, |word, byte| word << 8 | u32::from(*byte))
        })
        .collect();
    // A number has no leading zero words.
    let length = words
        .iter()
        .rposition(|word| *word != 0)
        .map_or(1, |at| at + 1);
    Mt::new_with_key(words[..length].iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::alpaca_eval;
    use common::jsonl::rows;

    #[test]
    fn the_twister_is_pythons() {
        // random.Random("dice").getrandbits(32), twice.
        let mut rng = python_random("dice");
        assert_eq!(
            [rng.next_u32(), rng.next_u32()],
            [1_153_565_136, 1_712_133_450]
        );
    }

    #[test]
    fn the_order_is_the_one_of_the_real_annotations() {
        let Some(data) = alpaca_eval() else { return };
        let prompts: Vec<String> = rows(&[data.join("prompts.jsonl")])
            .map(|row| row.unwrap().string("prompt").unwrap().to_owned())
            .collect();
        let mut checked = 0;
        for row in rows(&[data.join("annotations/claude-2.1.jsonl")]) {
            let row = row.unwrap();
            let prompt = &prompts[row.number("prompt_id").unwrap() as usize];
            assert_eq!(row.fields["switched"], is_switched(prompt, 0), "{prompt}");
            checked += 1;
        }
        assert_eq!(checked, 805);
    }
}
