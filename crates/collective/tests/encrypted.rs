//! Links under TLS: the same numbers, nothing readable on the way, and nobody who does not belong.

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use temper_collective::{Collective, LinkTls, SocketConfig, connect};

const TIMEOUT: Duration = Duration::from_secs(20);

/// Certificates for 127.0.0.1, signed by a CA that exists only here.
fn certificates() -> LinkTls {
    let mut ca_params = CertificateParams::default();
    ca_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().expect("a key");
    let ca = ca_params.self_signed(&ca_key).expect("a certificate");
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("an address");
    let own = params.signed_by(&key, &Issuer::new(ca_params, ca_key)).expect("a certificate");
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone()).expect("a CA");
    let (roots, provider) = (Arc::new(roots), Arc::new(ring::default_provider()));
    let chain = || vec![CertificateDer::from(own.der().to_vec())];
    let key = || PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("a version")
        .with_client_cert_verifier(verifier.build().expect("roots"))
        .with_single_cert(chain(), key())
        .expect("they fit");
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("a version")
        .with_root_certificates(roots)
        .with_client_auth_cert(chain(), key())
        .expect("they fit");
    LinkTls::new(&client, &server)
}

/// Everything that went between two sockets.
type Heard = Arc<Mutex<Vec<u8>>>;

/// Listens at an address of its own and passes on what comes to `target` and back, writing it down.
fn eavesdrop(target: SocketAddr) -> (SocketAddr, Heard) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let (address, heard) = (listener.local_addr().expect("bound"), Heard::default());
    let pass = |mut from: TcpStream, mut to: TcpStream, heard: Heard| {
        std::thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            while let Ok(len @ 1..) = from.read(&mut buffer) {
                heard.lock().expect("no panic").extend_from_slice(&buffer[..len]);
                if to.write_all(&buffer[..len]).is_err() {
                    return;
                }
            }
            drop(to.shutdown(Shutdown::Write));
        });
    };
    let written = Arc::clone(&heard);
    std::thread::spawn(move || {
        while let Ok((from, _)) = listener.accept() {
            let to = TcpStream::connect(target).expect("it listens");
            let (from_too, to_too) = (from.try_clone().expect("a socket"), to.try_clone().expect("a socket"));
            pass(from, to, Arc::clone(&written));
            pass(to_too, from_too, Arc::clone(&written));
        }
    });
    (address, heard)
}

/// The ranks of a world, rank 0 being reached through an eavesdropper.
fn ranks(tls: &[Option<LinkTls>], connect_timeout: Duration) -> (Vec<temper_collective::Result<Collective>>, Heard) {
    let listener = |_: &Option<LinkTls>| TcpListener::bind("127.0.0.1:0").expect("a free port");
    let listeners: Vec<TcpListener> = tls.iter().map(listener).collect();
    let mut addresses: Vec<SocketAddr> = listeners.iter().map(|l| l.local_addr().expect("bound")).collect();
    let (through, heard) = eavesdrop(addresses[0]);
    addresses[0] = through;
    let world = std::thread::scope(|scope| {
        let join = |(rank, (listener, tls)): (usize, (TcpListener, &Option<LinkTls>))| {
            let (addresses, tls) = (addresses.clone(), tls.clone());
            scope.spawn(move || {
                let config = SocketConfig { rank, addresses, token: 7, tls, connect_timeout, timeout: TIMEOUT };
                connect(&config, &listener)
            })
        };
        let handles: Vec<_> = listeners.into_iter().zip(tls).enumerate().map(join).collect();
        handles.into_iter().map(|handle| handle.join().expect("no panic")).collect()
    });
    (world, heard)
}

/// What `world` gathers of two million numbers, all ranks sending at once, and the bytes that rank 0 counted.
fn gather(world: Vec<temper_collective::Result<Collective>>) -> (Vec<Vec<f32>>, u64) {
    const LEN: usize = 700_001;
    let ranks: Vec<Collective> = world.into_iter().map(|rank| rank.expect("connected")).collect();
    std::thread::scope(|scope| {
        let run = |(rank, world): (usize, Collective)| {
            scope.spawn(move || {
                let parts: Vec<_> = (0..3).map(|i| i * LEN..(i + 1) * LEN).collect();
                let mut values = vec![0.0f32; 3 * LEN];
                values[parts[rank].clone()].fill(1.5 + rank as f32);
                world.all_gather(&mut values, &parts).expect("gathered");
                world.barrier().expect("all are there");
                (values, world.counts().total().bytes_sent)
            })
        };
        let handles: Vec<_> = ranks.into_iter().enumerate().map(run).collect();
        let all: Vec<_> = handles.into_iter().map(|handle| handle.join().expect("no panic")).collect();
        let sent = all[0].1;
        (all.into_iter().map(|(values, _)| values).collect(), sent)
    })
}

/// True where eight numbers of rank `rank` stand in what was heard.
fn reads(heard: &Heard, rank: usize) -> bool {
    let number = (1.5 + rank as f32).to_le_bytes();
    heard.lock().expect("no panic").windows(32).any(|part| part.chunks(4).all(|four| four == number))
}

#[test]
fn encrypted_ranks_gather_what_plain_ranks_do_and_nobody_reads_it() {
    let ours = certificates();
    let (plain, heard_plain) = ranks(&[None, None, None], TIMEOUT);
    let (encrypted, heard) = ranks(&[Some(ours.clone()), Some(ours.clone()), Some(ours)], TIMEOUT);
    let (plain, sent_plain) = gather(plain);
    let (encrypted, sent) = gather(encrypted);
    assert!(plain == encrypted && plain[0] == plain[2], "the same numbers on all ranks");
    assert_eq!(sent, sent_plain, "what is counted is what ranks say");
    assert!((0..3).all(|rank| rank > 1 || reads(&heard_plain, rank)), "plain numbers can be read");
    assert!((0..3).all(|rank| !reads(&heard, rank)), "encrypted ones cannot");
    let len = heard.lock().expect("no panic").len() as u64;
    assert!(len > sent, "they went this way: {len} bytes of {sent}");
}

#[test]
fn who_does_not_belong_is_refused_by_name() {
    let (ours, theirs) = (certificates(), certificates());
    for (first, second, complaint, answer) in [
        (Some(ours.clone()), Some(theirs), "invalid peer certificate", "turned away: received fatal alert"),
        (Some(ours.clone()), None, "it hung up: is it under TLS?", "turned away: received corrupt message"),
        (None, Some(ours.clone()), "received corrupt message", "no rank at all"),
    ] {
        let (world, _) = ranks(&[first, second], TIMEOUT / 20);
        let [lower, higher] = &world[..] else { panic!("two ranks") };
        let higher = higher.as_ref().expect_err("refused").to_string();
        assert!(higher.contains("rank 1 cannot connect to rank 0") && higher.contains(complaint), "{higher}");
        let lower = lower.as_ref().expect_err("nobody came").to_string();
        assert!(lower.contains("did not connect in time; one who came") && lower.contains(answer), "{lower}");
    }
}
