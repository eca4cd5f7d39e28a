//! Random histories and random uploads.

use patchbay::adapter::AdapterFiles;
use patchbay::store::PublishOptions;
use proptest::prelude::*;
use tempfile::tempdir;

use super::bounded;
use crate::store_support::{DENSE_BYTES, LOW_RANK_BYTES, Opened, adapter, files_below, open, open_with, plain, value};

/// One step of a history: on one of two stores, to one of two names.
#[derive(Clone, Debug)]
enum Step {
    Publish { store: usize, name: usize, value: u8, merge: bool },
    Remove { store: usize, name: usize },
    Resolve { store: usize, name: usize },
    Reopen { store: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let (store, name) = (0..2_usize, 0..2_usize);
    prop_oneof![
        4 => (store.clone(), name.clone(), 1..9_u8, any::<bool>())
            .prop_map(|(store, name, value, merge)| Step::Publish { store, name, value, merge }),
        2 => (store.clone(), name.clone()).prop_map(|(store, name)| Step::Remove { store, name }),
        4 => (store.clone(), name).prop_map(|(store, name)| Step::Resolve { store, name }),
        1 => store.prop_map(|store| Step::Reopen { store }),
    ]
}

async fn check_history(steps: &[Step]) {
    const NAMES: [&str; 2] = ["a", "b"];
    let root = tempdir().unwrap();
    // Room for one adapter of each form, so that most resolves load anew.
    let config = bounded(root.path(), LOW_RANK_BYTES + DENSE_BYTES, DENSE_BYTES);
    let mut stores = [open_with(config.clone()).await.store, open_with(config.clone()).await.store];
    // Per name: records so far, and what it means.
    let mut expected: [(u64, Option<(u64, f32)>); 2] = [(0, None); 2];
    for step in steps {
        match *step {
            Step::Publish { store, name, value, merge } => {
                let options = PublishOptions { merge, ..PublishOptions::default() };
                let value = f32::from(value);
                let status = stores[store].publish(NAMES[name], adapter(value), &options).await.unwrap();
                let (records, meaning) = &mut expected[name];
                *records += 1;
                *meaning = Some((*records, value));
                assert_eq!((status.generation, status.merge), (*records, merge));
            }
            Step::Remove { store, name } => {
                let removed = stores[store].remove(NAMES[name]).await;
                let (records, meaning) = &mut expected[name];
                assert_eq!(removed.is_ok(), meaning.is_some());
                *records += u64::from(meaning.take().is_some());
            }
            Step::Resolve { store, name } => {
                let resolved = stores[store].resolve(NAMES[name]).await.ok();
                let found = resolved.map(|adapter| (adapter.generation, value(&adapter)));
                assert_eq!(found, expected[name].1);
            }
            Step::Reopen { store } => stores[store] = open_with(config.clone()).await.store,
        }
        for store in &stores {
            let listed: Vec<_> = store.list().await.unwrap().into_iter().map(|s| (s.name, s.generation)).collect();
            let wanted = NAMES.iter().zip(&expected);
            let wanted: Vec<_> = wanted.filter_map(|(name, (_, m))| m.map(|m| ((*name).to_owned(), m.0))).collect();
            assert_eq!(listed, wanted);
        }
    }
}

fn block_on(work: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_history_means_the_fold_of_its_steps(steps in prop::collection::vec(step(), 1..14)) {
        block_on(check_history(&steps));
    }

    #[test]
    fn arbitrary_uploads_never_panic_and_leave_nothing(
        config in prop::collection::vec(any::<u8>(), 0..200),
        weights in prop::collection::vec(any::<u8>(), 0..200),
        good_config in any::<bool>(),
    ) {
        block_on(async {
            let root = tempdir().unwrap();
            let Opened { store, .. } = open(root.path()).await;
            let config = if good_config { adapter(1.0).config } else { config.into() };
            assert!(store.publish("a", AdapterFiles::new(config, weights.clone()), &plain()).await.is_err());
            assert!(store.upload_slot().await.unwrap().publish_archive("a", weights.into(), &plain()).await.is_err());
            assert!(files_below(root.path()).is_empty());
        });
    }
}
