//! Memory stays within its bounds.

use std::path::Path;

use patchbay::adapter::AdapterError;
use patchbay::store::{StoreConfig, StoreError};
use tempfile::tempdir;

use super::{bounded, served};
use crate::store_support::{
    DENSE_BYTES, LOW_RANK_BYTES, Opened, adapter, files_below, merged, open_with, plain, repeated_vector, squares,
    squares_and_a_linear, squares_of_rank, write_directory,
};

#[tokio::test]
async fn host_memory_holds_the_most_recently_used() {
    let root = tempdir().unwrap();
    let Opened { store, metrics, .. } = open_with(bounded(root.path(), 2 * LOW_RANK_BYTES, 0)).await;
    for (name, value) in [("a", 1.0), ("b", 2.0), ("c", 3.0)] {
        store.publish(name, adapter(value), &plain()).await.unwrap();
    }
    let loaded = async || {
        let listed = store.list().await.unwrap();
        listed.into_iter().filter(|status| status.loaded).map(|status| status.name).collect::<Vec<_>>()
    };
    assert_eq!(loaded().await, ["b", "c"]);
    served(&store, "b").await;
    assert_eq!(served(&store, "a").await, 1.0);
    assert_eq!(loaded().await, ["a", "b"]);
    assert_eq!(metrics.adapters_loaded_bytes.get(), 2 * LOW_RANK_BYTES as i64);
    // The report outlives the load.
    assert!(store.status("c").await.unwrap().report.is_some());
    let leases = (store.resolve("a").await.unwrap(), store.resolve("b").await.unwrap());
    assert!(matches!(store.resolve("c").await, Err(StoreError::Busy)));
    assert_eq!(loaded().await, ["a", "b"]);
    drop(leases);
    assert_eq!(served(&store, "c").await, 3.0);
}

#[tokio::test]
async fn dense_copies_stay_within_their_budget_to_the_byte() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open_with(bounded(root.path(), 1 << 20, 2 * DENSE_BYTES)).await;
    for (name, value) in [("a", 1.0), ("b", 2.0)] {
        store.publish(name, adapter(value), &merged()).await.unwrap();
    }
    let leases = (store.resolve("a").await.unwrap(), store.resolve("b").await.unwrap());
    let files = files_below(root.path());
    assert!(matches!(store.publish("c", adapter(3.0), &merged()).await, Err(StoreError::Busy)));
    assert_eq!(files_below(root.path()), files);
    store.publish("unmerged", adapter(4.0), &plain()).await.unwrap();
    // A replaced generation counts for as long as it is leased.
    assert!(matches!(store.publish("a", adapter(5.0), &merged()).await, Err(StoreError::Busy)));
    drop(leases);
    store.publish("c", adapter(3.0), &merged()).await.unwrap();
    assert_eq!((served(&store, "a").await, served(&store, "b").await, served(&store, "c").await), (1.0, 2.0, 3.0));
}

#[tokio::test]
async fn a_dense_copy_that_costs_less_is_made_where_the_budget_has_room() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open_with(bounded(root.path(), 1 << 20, DENSE_BYTES)).await;
    let first = store.publish("a", squares(1.0), &plain()).await.unwrap().report.unwrap();
    assert_eq!(
        (first.own_weight_bytes, first.bytes, first.warnings.as_slice()),
        (DENSE_BYTES, DENSE_BYTES, [].as_slice())
    );
    assert_eq!(served(&store, "a").await, 4.0);
    // While it is in use the budget has no room for another one, which is served all the same.
    let lease = store.resolve("a").await.unwrap();
    let second = store.publish("b", squares(2.0), &plain()).await.unwrap().report.unwrap();
    assert_eq!((second.own_weight_bytes, second.bytes), (0, 4 * LOW_RANK_BYTES));
    assert!(second.warnings.iter().any(|warning| warning.contains("merged_bytes_max")), "{:?}", second.warnings);
    drop(lease);
}

#[tokio::test]
async fn dense_copies_that_are_needed_go_before_those_that_cost_less() {
    for (room, own) in [(2 * DENSE_BYTES, 2 * DENSE_BYTES), (2 * DENSE_BYTES - 1, DENSE_BYTES)] {
        let root = tempdir().unwrap();
        let Opened { store, .. } = open_with(bounded(root.path(), 1 << 20, room)).await;
        let report = store.publish("a", squares_and_a_linear(1.0), &plain()).await.unwrap().report.unwrap();
        assert_eq!(report.own_weight_bytes, own);
        assert_eq!(report.warnings.is_empty(), own == room);
    }
    let root = tempdir().unwrap();
    let Opened { store, .. } = open_with(bounded(root.path(), 1 << 20, DENSE_BYTES - 1)).await;
    let error = store.publish("a", squares_and_a_linear(1.0), &plain()).await.unwrap_err();
    let StoreError::Refused(refusal) = &error else { panic!("{error}") };
    assert!(matches!(**refusal, AdapterError::OverBudget { .. }), "{error}");
}

#[tokio::test]
async fn what_alone_exceeds_a_bound_is_refused_and_changes_nothing() {
    let root = tempdir().unwrap();
    let Opened { store, metrics, .. } = open_with(bounded(root.path(), 1 << 20, DENSE_BYTES - 1)).await;
    let error = store.publish("a", adapter(1.0), &merged()).await.unwrap_err();
    let StoreError::Refused(refusal) = &error else { panic!("{error}") };
    assert!(matches!(**refusal, AdapterError::OverBudget { needed: DENSE_BYTES, .. }), "{error}");
    assert!(files_below(root.path()).is_empty());
    assert_eq!(metrics.adapters_loaded_bytes.get(), 0);
    let Opened { store, .. } = open_with(bounded(root.path(), LOW_RANK_BYTES - 1, 0)).await;
    let error = store.publish("a", adapter(1.0), &plain()).await.unwrap_err();
    assert!(matches!(error, StoreError::OverHostMemory { needed: LOW_RANK_BYTES, .. }), "{error}");
    assert!(files_below(root.path()).is_empty());
}

#[tokio::test]
async fn factors_that_exceed_host_memory_are_refused_before_they_are_made() {
    const RANK: usize = 4096;
    // Those of one of the two linears.
    const BYTES: usize = RANK * LOW_RANK_BYTES;
    for files in [repeated_vector(RANK), squares_of_rank(64)] {
        let root = tempdir().unwrap();
        let Opened { store, .. } = open_with(bounded(root.path(), BYTES - 1, 0)).await;
        let error = store.publish("a", files.clone(), &plain()).await.unwrap_err();
        // The second linear's were not counted any more.
        assert!(matches!(error, StoreError::OverHostMemory { needed: BYTES, .. }), "{error}");
        assert!(files_below(root.path()).is_empty());
        let Opened { store, .. } = open_with(bounded(root.path(), 2 * BYTES, 0)).await;
        let report = store.publish("a", files, &plain()).await.unwrap().report.unwrap();
        assert_eq!((report.bytes, report.own_weight_bytes), (2 * BYTES, 0));
    }
}

#[tokio::test]
async fn factors_that_are_merged_do_not_count_beside_the_dense_copies() {
    let root = tempdir().unwrap();
    let Opened { store, .. } = open_with(bounded(root.path(), 2 * DENSE_BYTES, 2 * DENSE_BYTES)).await;
    let report = store.publish("a", squares_of_rank(1), &merged()).await.unwrap().report.unwrap();
    assert_eq!((report.bytes, report.own_weight_bytes), (2 * DENSE_BYTES, 2 * DENSE_BYTES));
}

#[tokio::test]
async fn uploads_beyond_the_queue_are_busy() {
    let root = tempdir().unwrap();
    let config =
        StoreConfig { root: root.path().to_owned(), loads_max: 1, load_queue_max: 0, ..StoreConfig::default() };
    let Opened { store, .. } = open_with(config).await;
    write_directory(&root.path().join("plain"), &adapter(1.0));
    let slot = store.upload_slot().await.unwrap();
    assert!(matches!(store.upload_slot().await, Err(StoreError::Busy)));
    assert!(matches!(store.load_path("a", Path::new("plain"), &plain()).await, Err(StoreError::Busy)));
    drop(slot);
    assert!(store.upload_slot().await.is_ok());
    store.load_path("a", Path::new("plain"), &plain()).await.unwrap();
}
