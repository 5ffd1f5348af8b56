//! Servers in the process of a test, and bytes to read back.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test uses its part of it")]

use std::{path::Path, time::Duration};

use bytes::Bytes;
use fjordfs_client::{Client, File, Options};
use fjordfs_dataserver::DataServer;
use fjordfs_metaserver::MetaServer;
use fjordfs_proto::{Policy, cluster::TargetState};

/// A cluster whose servers are threads of this process.
pub struct Cluster {
    pub meta: Option<MetaServer>,
    pub data: Vec<Option<DataServer>>,
    pub address: String,
    policy: Policy,
    /// Goes away with the cluster.
    dir: tempfile::TempDir,
}

fn meta_server(root: &Path, listen: &str, policy: Policy) -> MetaServer {
    MetaServer::start(fjordfs_metaserver::Config {
        listen: listen.parse().unwrap(),
        default_policy: policy,
        heartbeat: Duration::from_millis(100),
        down_after: Duration::from_millis(500),
        ..fjordfs_metaserver::Config::new(root.join("meta"))
    })
    .unwrap()
}

pub fn data_server(dir: &Path, meta: &str, i: usize) -> DataServer {
    DataServer::start(fjordfs_dataserver::Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        name: format!("data-{i}"),
        cores: 1,
        volume_size: 64 << 20,
        ..fjordfs_dataserver::Config::new(meta, [dir.join(format!("data-{i}"))])
    })
    .unwrap()
}

impl Cluster {
    pub async fn start(servers: usize, policy: &str) -> Cluster {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let policy: Policy = policy.parse().unwrap();
        let root = dir.path().to_owned();
        let (meta, data) = tokio::task::spawn_blocking(move || {
            let meta = meta_server(&root, "127.0.0.1:0", policy);
            let address = meta.address().to_string();
            let data = (0..servers).map(|i| Some(data_server(&root, &address, i))).collect();
            (meta, data)
        })
        .await
        .unwrap();
        let cluster = Cluster { address: meta.address().to_string(), meta: Some(meta), data, policy, dir };
        let client = cluster.client().await;
        wait_until("all targets are up", || {
            let map = client.map();
            map.targets.len() == servers && map.targets.values().all(|t| t.state == TargetState::Up)
        })
        .await;
        client.shutdown().await.unwrap();
        cluster
    }

    pub async fn client(&self) -> Client {
        self.client_that_waits(Duration::from_secs(30)).await
    }

    /// One whose operations take no longer.
    pub async fn client_that_waits(&self, operation_timeout: Duration) -> Client {
        self.client_with(Options { operation_timeout, ..Options::default() }).await
    }

    pub async fn client_with(&self, options: Options) -> Client {
        Client::connect(&self.address, options).await.unwrap()
    }

    /// Stops the metaserver and starts it again where it was.
    pub async fn restart_meta(&mut self) {
        self.stop_meta().await;
        self.start_meta().await;
    }

    pub async fn stop_meta(&mut self) {
        let meta = self.meta.take().unwrap();
        tokio::task::spawn_blocking(move || meta.stop().unwrap()).await.unwrap();
    }

    /// Starts it again that was stopped, where it was.
    pub async fn start_meta(&mut self) {
        let (root, address, policy) = (self.dir.path().to_owned(), self.address.clone(), self.policy);
        let start = move || meta_server(&root, &address, policy);
        self.meta = Some(tokio::task::spawn_blocking(start).await.unwrap());
    }

    pub fn stop_data(&mut self, i: usize) {
        self.data[i].take().unwrap().stop().unwrap();
    }

    /// Starts one again that was stopped, on its data; it may have another address.
    pub async fn start_data(&mut self, i: usize) {
        let (root, address) = (self.dir.path().to_owned(), self.address.clone());
        let start = move || data_server(&root, &address, i);
        self.data[i] = Some(tokio::task::spawn_blocking(start).await.unwrap());
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for data in self.data.drain(..).flatten() {
            let _ = data.stop();
        }
        if let Some(meta) = self.meta.take() {
            let _ = meta.stop();
        }
    }
}

pub async fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..300 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("waited 15 s until {what}");
}

/// Bytes that differ from page to page and from seed to seed.
/// Returns when the client has heard that so many targets are down.
pub async fn wait_down(client: &Client, down: usize) {
    wait_until("the servers are down", || {
        client.map().targets.values().filter(|t| t.state == TargetState::Down).count() == down
    })
    .await;
}

pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (i.wrapping_mul(31) ^ (i >> 12).wrapping_mul(seed * 7 + 1) ^ seed) as u8)
        .collect()
}

pub async fn read_all(file: &File) -> Vec<u8> {
    let len = file.attr().size as usize;
    file.read_at(0, len).await.unwrap().concat()
}

pub async fn write_file(client: &Client, path: &str, data: &[u8]) {
    let file = client.create_path(path).await.unwrap();
    file.write_at(0, Bytes::copy_from_slice(data)).await.unwrap();
    file.close().await.unwrap();
}
