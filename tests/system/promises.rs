//! Every line of the README's promises and differences is proven by a test, which is named here. A line that is added there
//! without one fails here, and so does a test that has gone.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{collections::BTreeSet, fs, path::Path, process::Command};

/// How a line begins, and what proves it.
const PROVEN: &[(&str, &[&str])] = &[
    // Promises.
    ("`write`", &["maps_and_descriptors_see_each_other", "random_operations_do_what_they_do_locally"]),
    (
        "`close`",
        &[
            "what_is_closed_is_what_the_other_opens",
            "what_one_client_closes_another_reads",
            "what_was_decided_and_closed_is_there_for_who_asks_and_after_a_drop",
            "with_close_sync_a_killed_client_leaves_what_it_closed_as_well",
            "what_is_closed_is_seen_however_slowly_it_is_stored",
            "a_failed_write_back_is_told_once_and_what_was_committed_stays",
            "a_new_size_is_told_only_when_the_old_end_is_dropped",
        ],
    ),
    (
        "`fsync`",
        &[
            "a_killed_client_leaves_what_it_synced_and_no_garbage",
            "everything_killed_at_once_comes_back",
            "any_server_may_go_and_reads_and_writes_go_on",
            "two_servers_may_go_where_there_are_two_parity_shards",
            "what_was_synced_and_then_overwritten_survives_a_power_failure",
        ],
    ),
    (
        "`mkdir`, `rename`",
        &[
            "names_change_for_everyone_at_once",
            "a_dying_metaserver_neither_repeats_nor_loses_operations",
            "both_clients_see_the_same",
            "what_was_decided_survives_the_metaserver",
        ],
    ),
    ("`fsync` of a directory", &["everything_killed_at_once_comes_back"]),
    (
        "`rename`",
        &[
            "nobody_sees_what_others_have_seen_replaced",
            "names_change_for_everyone_at_once",
            "copied_files_have_the_bytes_and_times_they_were_given",
        ],
    ),
    (
        "write with `O_APPEND`",
        &[
            "appenders_on_two_clients_lose_nothing",
            "appends_from_two_clients_lose_nothing",
            "what_clients_do_at_once_keeps_every_promise",
            "nothing_is_appended_twice",
        ],
    ),
    (
        "`flock`, `fcntl`",
        &[
            "random_locks_of_three_open_files_go_as_on_a_local_filesystem",
            "who_waits_gets_it_in_turn",
            "locks_outlive_the_metaserver",
            "locks_go_with_their_client",
            "what_was_written_under_a_lost_lock_is_void",
            "who_has_the_lock_is_alone_and_sees_what_others_wrote",
            "a_lock_brings_the_others_bytes_into_an_open_file",
        ],
    ),
    (
        "`read`",
        &[
            "a_rotten_page_is_read_from_another_copy",
            "with_all_copies_rotten_a_read_fails_and_its_neighbours_do_not",
            "a_rotten_page_is_decoded_from_other_shards",
            "with_a_server_gone_and_a_page_rotten_every_byte_read_is_right",
            "whatever_m_servers_do_the_bytes_are_right",
            "with_more_than_m_bad_there_is_an_error_and_nothing_else",
        ],
    ),
    (
        "any operation",
        &[
            "writing_and_reading_without_any_data_server_ends_in_an_error_and_not_in_a_hang",
            "a_detached_mount_ends_although_nobody_answers",
        ],
    ),
    // Differences.
    (
        "a file that is open here and was removed",
        &[
            "what_others_remove_or_replace_stays_while_it_is_open",
            "what_goes_while_its_client_stands_still_is_never_read_as_something_else",
        ],
    ),
    ("a directory that is open here", &["what_others_have_removed_is_missing_and_not_something_else"]),
    ("after a client dies", &["a_dead_client_holds_others_up_for_a_while_only"]),
    ("what a program on another client wrote", &["nobody_sees_what_others_have_seen_replaced"]),
    ("`flock` and open file locks", &["closing_gives_locks_up"]),
    (
        "`F_GETLK` shows",
        &[
            "locks_of_processes_conflict_across_clients_and_are_shown",
            "processes_that_wait_for_each_other_are_told",
        ],
    ),
    (
        "after the metaserver has restarted, new locks",
        &["locks_outlive_a_restart_and_nothing_is_granted_before_all_are_declared"],
    ),
    (
        "SQLite's write-ahead log",
        &["sqlite_is_shared_by_clients", "sqlite_with_a_write_ahead_log_is_shared_by_processes"],
    ),
    ("`fallocate`", &["holes_and_copies_free_and_share_space", "random_operations_do_what_they_do_locally"]),
    ("`sync` and `syncfs`", &["sync_of_everything"]),
    ("`security.selinux`", &["a_label_that_was_never_set_is_refused_and_one_that_was_is_kept"]),
    (
        "sgid of a file that its group may not execute",
        &["sgid_that_privileges_nobody_stays_when_somebody_outside_the_group_writes"],
    ),
    ("access times", &["access_times_follow_the_rules_of_relatime"]),
    (
        "what is written while",
        &["any_server_may_go_and_reads_and_writes_go_on", "a_put_says_who_has_no_shard"],
    ),
    ("one metaserver", &["an_import_survives_the_metaserver"]),
    ("what was written through a shared mapping", &["a_mapping_is_seen_by_others_after_msync"]),
    ("a file that was removed and is held", &["what_linux_does_not_pass_on"]),
    ("`flock` of a directory", &["what_linux_does_not_pass_on"]),
];

/// Lines that say what is not there.
const NOTHING_TO_PROVE: &[&str] = &["no encryption", "no `RENAME_WHITEOUT`"];

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The first cells of the tables between two headings.
fn lines(readme: &str) -> Vec<&str> {
    let from = readme.find("\n## What is promised\n").unwrap();
    let section = &readme[from + 1..];
    let section = &section[..section[3..].find("\n## ").unwrap()];
    let rows =
        section.lines().filter_map(|line| line.strip_prefix("| ")).filter(|line| !line.starts_with("When "));
    rows.filter(|line| !line.starts_with("difference |")).collect()
}

#[test]
fn every_line_of_the_readme_has_its_test() {
    let readme = fs::read_to_string(repository().join("README.md")).unwrap();
    let lines = lines(&readme);
    assert!(lines.len() > 20, "{lines:#?}");
    let mut used = BTreeSet::new();
    for line in &lines {
        // The longest beginning: "`rename`" is not "`rename` of something".
        let fits = |begin: &&str| line.starts_with(begin);
        let proven = PROVEN.iter().map(|(begin, _)| *begin).chain(NOTHING_TO_PROVE.iter().copied());
        let begin = proven.filter(|begin| fits(begin)).max_by_key(|begin| begin.len());
        let begin = begin.unwrap_or_else(|| panic!("no test is named for the README's line\n{line}"));
        assert!(used.insert(begin), "two lines begin with {begin}");
    }
    let all = PROVEN.iter().map(|(begin, _)| *begin).chain(NOTHING_TO_PROVE.iter().copied());
    let gone: Vec<&str> = all.filter(|begin| !used.contains(begin)).collect();
    assert!(gone.is_empty(), "lines that the README does not have any more: {gone:?}");
}

#[test]
fn the_tests_that_are_named_exist() {
    let mut command = Command::new("grep");
    command.args(["-rhoE", "--include=*.rs", "fn [a-z0-9_]+\\(", "tests", "client", "metaserver"]);
    let found = command.current_dir(repository()).output().unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    let known: BTreeSet<&str> = found.lines().collect();
    for (begin, tests) in PROVEN {
        for test in *tests {
            assert!(
                known.contains(format!("fn {test}(").as_str()),
                "{test}, which shall prove {begin}, is gone"
            );
        }
    }
}
